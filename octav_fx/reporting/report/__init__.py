"""The report of a quantized model as one HTML file: collect.py the values, layout.py the graph, page.py the file."""
