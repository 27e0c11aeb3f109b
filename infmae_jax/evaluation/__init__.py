"""Measures of what an encoder has learnt: linear probe and k-NN on frozen features."""
