"""Mutation test of the pure code: which small changes does no test notice?

A mutant is the tree with one operator or number changed. It is killed where a test fails, among those that run the
changed statement. One that survives shows a test that is missing, or a change that makes no difference. The sample is
random, the same for the same seed; the work is done in a copy of the tree.
"""
