"""How a module becomes a graph, and what holds the graph afterwards."""
