"""Pictures, plots and pages that show what a run has done."""
