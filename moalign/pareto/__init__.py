"""The judge: pure numpy functions over points, the same for all methods. Nothing here knows a method's name.

A point is the mean reward vector of one policy at one preference; larger is better in every objective.
"""
