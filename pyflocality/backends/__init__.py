"""Which implementation serves an operation, and the report on this installation."""
