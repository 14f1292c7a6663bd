"""Large images and long jobs: sets made of two photographs, and commands watched from outside."""
