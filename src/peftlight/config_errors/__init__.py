"""Errors of the configuration in one screen: what is wrong, where it stands, what was expected, what to do.

`yaml_lines` and `given` know what the user gave and where, and import nothing heavy. `places` and `type_words` know
what could be given. `explain` recognises what jsonargparse says; `sentences` and `class_sentences` say it to
a person.
"""
