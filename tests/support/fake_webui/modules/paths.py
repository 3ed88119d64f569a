"""Where the host is, and where its users' files are: the same folder, unless --data-dir says otherwise."""

from modules.shared_cmd_options import cmd_opts

script_path = cmd_opts.data_dir
data_path = cmd_opts.data_dir
