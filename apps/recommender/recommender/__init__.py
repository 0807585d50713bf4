"""Shops whose customers rate films learn one recommender; no customer is given away."""
