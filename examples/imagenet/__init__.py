"""The paper's recipes on ImageNet: train.py is the recipe, data.py the folders."""
