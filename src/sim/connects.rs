//! Rules of outbound connections, by hand and over seeds.
