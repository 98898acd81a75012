"""The paper's recipe on SQuAD v1.1: train.py is the recipe, data.py the windows, score.py the metrics."""
