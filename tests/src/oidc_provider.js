// An OpenID provider (npm oidc-provider) that logs the user `ann` in without asking.
// Arguments: port, redirect URIs separated by spaces, seconds that an access token lasts.
const { Provider } = require('oidc-provider');

const [port, redirects, lasts] = process.argv.slice(-3);
const issuer = `http://127.0.0.1:${port}`;
const client = (client_id, more) => ({
    client_id,
    client_secret: 'secret-of-the-client',
    redirect_uris: redirects.split(' '),
    post_logout_redirect_uris: ['http://127.0.0.1:1/bye'],
    grant_types: ['authorization_code', 'refresh_token', 'client_credentials'],
    ...more,
});
const resource = 'https://api.example';

const provider = new Provider(issuer, {
    clients: [client('shop'), client('posting', { token_endpoint_auth_method: 'client_secret_post' })],
    cookies: { keys: ['a key for cookies of tests'] },
    scopes: ['openid', 'offline_access', 'email', 'read', 'write'],
    claims: { openid: ['sub'], email: ['email'] },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, email: `${id}@example.com` }) }),
    issueRefreshToken: () => true,
    rotateRefreshToken: true,
    pkce: { required: () => false, methods: ['S256'] },
    ttl: { AccessToken: Number(lasts), ClientCredentials: 600, IdToken: 600, RefreshToken: 600, Session: 600,
           Grant: 600, Interaction: 600 },
    interactions: { url: (_, interaction) => `/login/${interaction.uid}` },
    features: {
        devInteractions: { enabled: false },
        clientCredentials: { enabled: true },
        introspection: { enabled: true, allowedPolicy: () => true },
        revocation: { enabled: true },
        rpInitiatedLogout: { enabled: true },
        resourceIndicators: {
            enabled: true,
            getResourceServerInfo: () => ({ scope: 'read write', accessTokenFormat: 'jwt', audience: 'shop' }),
        },
    },
});

// Every step of a login is finished at once; with `login_hint=nobody` the user says no.
provider.use(async (ctx, next) => {
    if (!ctx.path.startsWith('/login/')) return next();
    const { prompt, params, session } = await provider.interactionDetails(ctx.req, ctx.res);
    if (params.login_hint === 'nobody') {
        return provider.interactionFinished(ctx.req, ctx.res, { error: 'access_denied' });
    }
    if (prompt.name === 'login') {
        return provider.interactionFinished(ctx.req, ctx.res, { login: { accountId: 'ann' } });
    }
    const grant = new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
    grant.addOIDCScope(params.scope);
    return provider.interactionFinished(ctx.req, ctx.res, { consent: { grantId: await grant.save() } },
        { mergeWithLastSubmission: true });
});

provider.on('server_error', (_, error) => console.error(error));
provider.listen(Number(port), '127.0.0.1', () => console.log('ready', resource));
