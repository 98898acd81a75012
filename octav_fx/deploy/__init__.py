"""From a trained model to integers: static clips, integer weights, files for other runtimes."""
