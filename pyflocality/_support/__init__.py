"""What every room uses: checks of arguments, memory budget, progress, files and locks."""
