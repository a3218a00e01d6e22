"Prints the lower ends of the supported ranges in settings.ini, as constraints for pip"
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent


def oldest(
    requirements:list # Lines such as `pandas>=2.2,<4`
) -> list: # Lines such as `pandas==2.2`
    "Return a constraint for the lower end of each range"
    return [re.sub(r'>=([\d.]+)[^;]*?(\s*;.*)?$', r'==\1\2', r) for r in requirements]

def requirements() -> list:
    "Return the requirements of the package"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return [r.strip() for r in cfg['DEFAULT']['requirements'].splitlines() if r.strip()]


if __name__=='__main__': print(*oldest(requirements()), sep='\n')
