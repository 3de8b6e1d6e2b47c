"""How far a method's images are from the baseline's: metrics, their intervals, and the times of a run."""
