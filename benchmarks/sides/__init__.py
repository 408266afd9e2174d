"""What is measured against each other. Each side is a process that runs one round for each line it reads."""
