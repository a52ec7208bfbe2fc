"""Further outputs of a model: counts of their answers, and their part of a drift reference."""
