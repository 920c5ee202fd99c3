"""From a configuration to a trained model: batches, loss, the step, checkpoints, reports and the loop around
them.
"""
