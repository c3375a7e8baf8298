"""Universal attacks: one change, found once, that fools a model on images it has never seen."""
