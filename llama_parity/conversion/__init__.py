"""What convert.py is made of."""
