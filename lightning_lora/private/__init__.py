"""The private parts of other libraries that this package reaches into: one file a library.

Each function is named for what it gives, and says what happens in a version of the library without the private name.
The table in .github/CONTRIBUTING.md lists all names, also those that a single line elsewhere needs. A test compares
it with the oldest and the newest versions.
"""
