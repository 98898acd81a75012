"""The study: methods of finding clips compared by the same recipes, on data that every machine has."""
