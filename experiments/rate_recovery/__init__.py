"""Can a known rate matrix be found again from the transitions of its chain?"""
