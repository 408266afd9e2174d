"""What an adapter is: folders on disk, kinds, primitives, and the registry of those loaded."""
