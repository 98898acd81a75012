"""The vocabulary of graphs: ops and their rules, edits, analyses. Nothing here captures or rewrites by itself."""
