"""Pipeline: a task from rows to committed results, drift state and label metrics."""
