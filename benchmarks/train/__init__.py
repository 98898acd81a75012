"""Training recipes: does it train as well as the paper says, and better than what people use now."""
