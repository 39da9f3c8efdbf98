"""From batches to outcomes, whatever road they take."""
