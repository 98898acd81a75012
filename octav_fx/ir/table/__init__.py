"""The rows of every op that graphs are understood by, one file for each family. A new op is one row here."""
