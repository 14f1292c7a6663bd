"""What is timed: cases, their tensors and yardsticks, and what runs them on a CPU or a GPU."""
