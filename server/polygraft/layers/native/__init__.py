"""The operators in C++, and how they are built and called."""
