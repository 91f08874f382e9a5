"""The experiments of Rezende & Mohamed 2015: ``python -m rezende_mohamed_2015 NAME``."""
