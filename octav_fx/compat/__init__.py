"""Every private name of torch that octav_fx uses, one function or name each: what a new version of torch may break.

tensors.py, modules.py and graphs.py need torch alone; inductor.py imports Inductor and Dynamo, which takes seconds.
"""
