"""Private helpers that know nothing of prototypes: arguments, batches, processes, files, seeds."""
