"""Tasks: questions, answers, and the rewards that compare them."""
