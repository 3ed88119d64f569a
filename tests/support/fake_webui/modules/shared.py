"""The options and the state of what is being generated."""

from modules.shared_cmd_options import cmd_opts  # noqa: F401


class Options:
    sd_model_checkpoint = "tiny"


class State:
    interrupted = False
    textinfo = None

    def __init__(self):
        self.job = ""
        self.jobs = []
        self.texts = []

    def begin(self, job="(unknown)"):
        self.job = job
        self.jobs.append(job)

    def end(self):
        self.job = ""

    def __setattr__(self, name, value):
        if name == "textinfo":
            self.texts.append(value)
        object.__setattr__(self, name, value)


opts = Options()
state = State()
