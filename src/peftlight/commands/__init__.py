"""What is done with a trained adapter on the command line: one file, and in it one function, for each command.

A command's parameters and their docstring are its arguments and help: those without a default stand alone, in order,
the others are options, and so are the fields of a parameter that is a dataclass. Heavy imports stand inside the
function, so that its help costs nothing.
"""
