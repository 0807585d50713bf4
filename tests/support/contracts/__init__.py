"""What every mechanism, strategy and client must obey: abstract tests, to be subclassed.

A subclass names its subject and inherits the claims. Every claim about noise is tested both ways:
the stated scale is accepted and one 3 % off is rejected.
"""
