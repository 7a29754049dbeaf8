"""Terms that keep the instantaneous velocity (`objective/anchor=`)."""
