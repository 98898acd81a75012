"""The command line, octav-fx: a file for models, one for what commands do, one for what they print."""
