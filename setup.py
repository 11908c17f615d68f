from setuptools import setup

setup()  # pyproject.toml has everything
