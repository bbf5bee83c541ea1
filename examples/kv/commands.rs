//! The commands: their names, their words, and which of these are keys.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Ping,
    Echo,
    Select,
    Config,
    Docs,
    Quit,
    Get,
    Set,
    Incr,
    Expire,
    Ttl,
    Lpush,
    Lpop,
    Lrange,
    Del,
    Exists,
    Mget,
    Unknown,
}

/// Which words of a command are keys.
pub(crate) enum Keys {
    None,
    First,
    All,
}

impl Command {
    pub(crate) fn of(word: &[u8]) -> Command {
        use Command::*;
        let mut name = [0; 8];
        let Some(name) = name.get_mut(..word.len()) else { return Unknown };
        name.copy_from_slice(word);
        name.make_ascii_uppercase();
        match &*name {
            b"GET" => Get,
            b"SET" => Set,
            b"INCR" => Incr,
            b"LPUSH" => Lpush,
            b"LPOP" => Lpop,
            b"LRANGE" => Lrange,
            b"MGET" => Mget,
            b"DEL" => Del,
            b"EXISTS" => Exists,
            b"EXPIRE" => Expire,
            b"TTL" => Ttl,
            b"PING" => Ping,
            b"ECHO" => Echo,
            b"SELECT" => Select,
            b"CONFIG" => Config,
            b"COMMAND" => Docs,
            b"QUIT" => Quit,
            _ => Unknown,
        }
    }

    pub(crate) fn keys(self) -> Keys {
        use Command::*;
        match self {
            Ping | Echo | Select | Config | Docs | Quit | Unknown => Keys::None,
            Get | Set | Incr | Expire | Ttl | Lpush | Lpop | Lrange => Keys::First,
            Del | Exists | Mget => Keys::All,
        }
    }

    /// Whether it may have so many words, its name included.
    pub(crate) fn takes(self, words: usize) -> bool {
        use Command::*;
        match self {
            Get | Incr | Ttl | Echo | Select => words == 2,
            Ping => words <= 2,
            Set => words == 3 || words == 5,
            Expire => words == 3,
            Lrange => words == 4,
            Lpop => words == 2 || words == 3,
            Lpush => words >= 3,
            Del | Exists | Mget | Config => words >= 2,
            Docs | Quit | Unknown => true,
        }
    }
}
