//! What one row of the table of keys says.

use std::ops::RangeInclusive;

/// What a key's value must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What Go's `strconv.ParseBool` accepts.
    Bool,
    /// A decimal number in these bounds.
    Int(i64, i64),
    /// Text as Go's `time.ParseDuration` reads it, not negative.
    Duration,
    /// Any text.
    Text,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// Network in CIDR notation, host bits zero.
    Cidr,
    /// An IP address.
    Address,
    /// An IP address and a port.
    SocketAddress,
    /// `first-last`.
    PortRange,
    /// A lower-case DNS name.
    Domain,
    /// A name of a Kubernetes object: one lower-case DNS label.
    Label,
    /// Host and path of a registry, without a scheme.
    Registry,
    /// One component of the `disable` list.
    Component,
    /// `https://host[:port]`.
    ServerUrl,
    /// `name=value`, handed to a component.
    Argument,
    /// A path.
    Path,
    /// Anything, never to be shown.
    Secret,
}

impl Kind {
    /// Bounds of a port that a server listens on.
    pub const PORT: Self = Self::Int(1, 65_535);

    /// What to call a value in help text.
    pub const fn placeholder(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::Int(..) => "NUMBER",
            Self::Duration => "DURATION",
            Self::Text | Self::OneOf(_) => "VALUE",
            Self::Cidr => "CIDR",
            Self::Address => "IP",
            Self::SocketAddress => "IP:PORT",
            Self::PortRange => "FIRST-LAST",
            Self::Domain | Self::Label => "NAME",
            Self::Registry => "HOST[:PORT]",
            Self::Component => "ITEM",
            Self::ServerUrl => "URL",
            Self::Argument => "NAME=VALUE",
            Self::Path => "PATH",
            Self::Secret => "SECRET",
        }
    }

    /// Bounds of a number.
    pub const fn bounds(self) -> Option<RangeInclusive<i64>> {
        if let Self::Int(min, max) = self { Some(min..=max) } else { None }
    }
}

/// Whether a key may be given more than once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// The last value counts.
    Once,
    /// All values count.
    Many,
    /// All values count, and each may hold several, separated by commas.
    Split,
}

/// Who acts on a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// This daemon only.
    Ours,
    /// This daemon and upstream k3s.
    Both,
    /// Upstream k3s only: checked here, kept, passed on.
    Upstream,
    /// An old name of another key.
    Renamed(&'static str),
}

/// Sections of the help text, in its order. Names are those a K3s user knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Keys K3s does not have.
    Store,
    /// Founding, joining, secrets.
    Cluster,
    /// Pod and service networks.
    Networking,
    /// What is deployed.
    Components,
    /// Snapshots, external datastores.
    Database,
    /// Directories.
    Data,
    /// The API server's address.
    Listener,
    /// kubeconfig.
    Client,
    /// Local storage.
    Storage,
    /// Arguments for components.
    Flags,
    /// The node object.
    AgentNode,
    /// containerd.
    AgentRuntime,
    /// Addresses of the node, flannel.
    AgentNetworking,
    /// Arguments for kubelet and kube-proxy.
    AgentFlags,
    /// Configuration file and logging.
    Logging,
    /// Not stable upstream.
    Experimental,
}

impl Group {
    /// Heading in the help text.
    pub const fn heading(self) -> &'static str {
        match self {
            Self::Store => "Store (k3s-server only)",
            Self::Cluster => "Cluster",
            Self::Networking => "Networking",
            Self::Components => "Components",
            Self::Database => "Database",
            Self::Data => "Data",
            Self::Listener => "Listener",
            Self::Client => "Client",
            Self::Storage => "Storage",
            Self::Flags => "Flags for components",
            Self::AgentNode => "Agent: node",
            Self::AgentRuntime => "Agent: runtime",
            Self::AgentNetworking => "Agent: networking",
            Self::AgentFlags => "Agent: flags",
            Self::Logging => "Configuration and logging",
            Self::Experimental => "Experimental",
        }
    }
}

/// One row.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    /// Long flag and key in the file.
    pub name: &'static str,
    /// One-letter flag.
    pub short: Option<char>,
    /// Environment variables, the strongest first.
    pub environment: &'static [&'static str],
    /// Form of a value.
    pub kind: Kind,
    /// Whether there may be several.
    pub repeat: Repeat,
    /// Default as it would be written, items separated by commas; empty: none.
    pub default: &'static str,
    /// Says what the default is when it depends on other things.
    pub default_note: &'static str,
    /// Section of the help.
    pub group: Group,
    /// Must be equal on all servers.
    pub critical: bool,
    /// Who acts on it.
    pub role: Role,
    /// Left out of `--help`.
    pub hidden: bool,
    /// What it does, in our words.
    pub help: &'static str,
}

impl Key {
    /// A key with the commonest attributes: once, visible, for upstream.
    pub const fn new(name: &'static str, kind: Kind, group: Group, help: &'static str) -> Self {
        Self {
            name,
            short: None,
            environment: &[],
            kind,
            repeat: Repeat::Once,
            default: "",
            default_note: "",
            group,
            critical: false,
            role: Role::Upstream,
            hidden: false,
            help,
        }
    }

    /// With a one-letter flag.
    #[must_use]
    pub const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }

    /// With environment variables.
    #[must_use]
    pub const fn env(mut self, names: &'static [&'static str]) -> Self {
        self.environment = names;
        self
    }

    /// With a fixed default.
    #[must_use]
    pub const fn default(mut self, text: &'static str) -> Self {
        self.default = text;
        self
    }

    /// With a default that depends on other things.
    #[must_use]
    pub const fn default_note(mut self, text: &'static str) -> Self {
        self.default_note = text;
        self
    }

    /// May be repeated.
    #[must_use]
    pub const fn many(mut self) -> Self {
        self.repeat = Repeat::Many;
        self
    }

    /// May be repeated and split at commas.
    #[must_use]
    pub const fn split(mut self) -> Self {
        self.repeat = Repeat::Split;
        self
    }

    /// Must be equal on all servers.
    #[must_use]
    pub const fn critical(mut self) -> Self {
        self.critical = true;
        self
    }

    /// Acted on by this daemon only.
    #[must_use]
    pub const fn ours(mut self) -> Self {
        self.role = Role::Ours;
        self
    }

    /// Acted on here and upstream.
    #[must_use]
    pub const fn both(mut self) -> Self {
        self.role = Role::Both;
        self
    }

    /// An old name.
    #[must_use]
    pub const fn renamed(mut self, new: &'static str) -> Self {
        self.role = Role::Renamed(new);
        self.hidden = true;
        self
    }

    /// Not in `--help`.
    #[must_use]
    pub const fn hidden(mut self) -> Self {
        self.hidden = true;
        self
    }

    /// Whether several values count.
    pub const fn is_list(&self) -> bool {
        !matches!(self.repeat, Repeat::Once)
    }

    /// Whether its value may not be shown.
    pub const fn is_secret(&self) -> bool {
        matches!(self.kind, Kind::Secret)
    }
}
