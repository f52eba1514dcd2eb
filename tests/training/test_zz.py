import os
from test_processes import folder, start, finish
def test_x(folder):
    jobs=os.environ["JOBS"].split()
    for w in finish(start(int(os.environ.get("N",2)), folder, *jobs)): print(w[-1500:])
