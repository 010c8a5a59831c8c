"""The judge: pure numpy functions over points, the same for all methods.

A point is the mean reward vector of one policy at one preference; larger is better in every objective.

* ``front``: checked points, the non-dominated set, layers.
* ``directions``: the points nearest to the direction that a preference names, for choosing what to train on.
* ``hypervolume``: hypervolume and its share of an optimum's.
* ``indicators``: Kendall's tau, inner product, expected utility, IGD+, spacing, sparsity, regret.
* ``statistics``: seeded paired bootstrap over prompts, and over seeds as a second level.
* ``points``: the calculator over a CSV table (``moalign eval --points``).

Nothing here knows a method's name, and nothing here imports torch, pandas or scipy.
"""
