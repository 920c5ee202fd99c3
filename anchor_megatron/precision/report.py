def summary_table(r): return ""
def write_report(*a): pass
