"""The parity check: does an engine compute what the eager network computes?"""
