"""A backbone and a shortcut that `flowanchor` finds without knowing them."""
