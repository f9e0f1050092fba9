"""Modules as their owners give them: copies that share no tensor, their own forward, what is wrapped around them.

isolation    copies of modules, by the one conversion that everything that is run comes from
own_forward  which modules can be read, their forward on a copy, and what it raises
wrappers     the model inside of wrappers; a normalisation ahead of it
"""
