"""The differentiation rules, one file per kind of operator.

``registry.py`` holds the table, ``library.py`` lists the files that fill it, ``kinds.py`` the constructors of rules.
"""
