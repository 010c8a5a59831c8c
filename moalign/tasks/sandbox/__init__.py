"""The built-in task whose exact optimum is known: no download, no reward model, no doubt.

``world``: topics, slots, phrases and what they are worth. ``scorer``: rewards of any text.
``optimum``: the best policy for every preference by enumeration. ``base``: the tiny language model.
"""
